"""This robot with these policies: checks, command lines, policy families, stages before RL and commands after it."""
