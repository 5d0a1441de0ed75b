"""Gymnasium tasks behind the environment's contract (reinflow/env.py): any environment with flat Box observations and
Box actions, such as Hopper-v5, in whole chunks and in worker processes; and data sets of it, made offline.

Knows neither torch nor a policy; `collect` alone loads stable-baselines3, when it trains.
"""
