"""Rewards: built-in rules and the user's reward function, run in a process apart from the trainer."""
