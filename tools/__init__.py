"""Floor 4: offline work over public names: synthetic models, benchmarks, fuzzing.

May import: anything below floor 5.
"""
