"""Build plans that need more than arithmetic: weight clusters and dense model measurements."""
