"""The Ascend side of the runtime: torchair with or without a device, and a simulator of the graphs that it makes."""
