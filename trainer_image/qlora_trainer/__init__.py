"""The program that runs in a QLoRAJob's pods: prepare, train and publish over one workspace."""
