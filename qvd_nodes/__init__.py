"""ComfyUI nodes, thin over `qvd_core`. Not there yet: this package is empty, and nothing is registered with ComfyUI."""
