"""What vision-language-action policies of LeRobot share, for any robot; no simulator."""
