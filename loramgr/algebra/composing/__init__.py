"""Methods that combine adapters, each on the true deltas: a table of them, and what they are made of."""
