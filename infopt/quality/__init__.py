"""Is the answer still the same? Fidelity on equal tokens, behaviour on prompts, task scores: METRICS, section 4."""
