"""Laying a model out on many devices: the mesh, and the rules from logical axes to mesh axes."""
