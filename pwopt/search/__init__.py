"""The search for the split of every layer: what each costs, and which ones to take."""
