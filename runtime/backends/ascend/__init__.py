"""Ascend NPUs: torchair's graphs on a card, or on the GE simulator."""
