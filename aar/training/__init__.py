"""Training of the models: `aar train-sat`, `aar tokenize`, `aar train-aar`."""
