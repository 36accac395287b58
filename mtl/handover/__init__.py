"""What comes after training: exports, evaluation of what is deployed, answers in batch and in a chat."""
