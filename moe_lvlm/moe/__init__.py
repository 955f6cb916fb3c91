"""Experts, dispatch, the layer, decoder layers, upcycling."""
