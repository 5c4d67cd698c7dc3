"""Loops that train the generators, resume after a kill, and the cells of a grid."""
