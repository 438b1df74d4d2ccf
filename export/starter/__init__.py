"""The starter: a small world, and the recipes of the models that ship with the project."""
