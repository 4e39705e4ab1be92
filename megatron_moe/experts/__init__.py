"""Which neurons of the dense FFN each expert gets, how they are scaled, what the router says."""
