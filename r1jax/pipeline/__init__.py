"""R1's stages as a graph: what each one reads, leaves behind, and when it is stale."""
