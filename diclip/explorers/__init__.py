"""Widgets to explore with: each a function from a choice to a picture, and a thin layer of ipywidgets around it."""
