"""Rule rewards: text -> float on the host; in_graph.py holds the twins on tokens."""
