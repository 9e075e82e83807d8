"""All that goes into the model archive: a batch flows inputs -> images -> engine -> responses."""
