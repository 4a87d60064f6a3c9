"""The tower at 8 bits and in float16: activations looked at, outliers handled."""
