"""What is measured on a real pretrained ViT and real pictures."""
