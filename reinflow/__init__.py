"""ReinFlow's rooms: flow-matching policies, PPO over their denoising chain, checkpoints, tracking and evaluation.

Nothing in this package knows a robot, a simulator or a vision-language model: it imports neither mujoco nor
lerobot. Someone with another robot takes it whole and writes one environment and one policy file.
"""


class UserError(Exception):
    """Something the user can mend; the message names it and the remedy. Front doors print it without a traceback."""
