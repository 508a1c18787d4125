"""What goes on around the training loop: steps in flight, steps that go wrong, signals, where events go."""
