"""The nodes themselves: schemas and a few lines each; all work is done in the modules beside this package."""
