"""The kinds of models that files are recognized as; none until a test adds its own."""

from comfy.supported_models_base import BASE

models: list[type[BASE]] = []
