"""x"""
from lightning_dropreg import functional
