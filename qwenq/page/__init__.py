"""The local page: the command line's estimates, with sliders."""
