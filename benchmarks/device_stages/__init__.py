"""The stages of `make gpu` that are no benchmark of their own, one module each: `run(device)`."""
