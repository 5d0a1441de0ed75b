"""What seeds are for. Nothing is ever chosen by reporting seeds.

0 .. 4,999      training, demonstrations
5,000 .. 9,999  tuning: they choose checkpoints and settings
10,000 ..       reporting
"""

FIRST_TUNING_SEED = 5_000
FIRST_REPORTING_SEED = 10_000
