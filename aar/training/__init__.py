"""Training of the models: the losses so far."""
