"""Models on many devices: the mesh, and the rules that map logical axes to mesh axes."""
