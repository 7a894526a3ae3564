"""Tasks, callbacks, data and loggers for Lightning. Import from the modules: this package itself loads nothing."""
