"""The simulated SO-101: scene, episodes, images, expert and vector environments. MuJoCo; no torch, no LeRobot."""
