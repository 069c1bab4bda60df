"""Around translation: Moses's tokens, scores, ways to decode compared, and which of two outputs is better."""
