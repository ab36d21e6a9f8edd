"""Evaluation: sample held-out problems and say how often the policy is right."""
