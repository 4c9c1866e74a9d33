"""lsast_train: the prompt space of an artist, learned against a frozen base; distillation and fine-tuning of styles."""
