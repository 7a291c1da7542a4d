"""Ready-made `ui` results of nodes. QVD makes its own."""
