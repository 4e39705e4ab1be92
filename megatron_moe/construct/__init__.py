"""Plans that are more than arithmetic: clusters of weights, and measurements of the dense model."""
