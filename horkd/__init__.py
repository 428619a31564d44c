"""HORKD: hybrid order relational knowledge distillation (AAAI 2020). See README.md."""
