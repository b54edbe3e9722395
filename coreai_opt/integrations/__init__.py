"""Other packages' ways of loading and training models. Each module needs its package and loads on request."""
