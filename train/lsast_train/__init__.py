"""lsast_train: the prompt space of an artist, learned against a frozen base, and the training of the base `mini`."""
