"""Super tickets in pre-trained language models: find them, retrain them, keep what is small, fast and good."""
