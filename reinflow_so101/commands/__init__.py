"""Over a finished run or policy: evaluate, doctor, materialize."""
