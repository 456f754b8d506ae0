"""What a machine would do with a model: device profiles, calibration, forecast."""
