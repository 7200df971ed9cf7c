"""The processor turns messages and images into arrays for the graphs, and tokens into text and boxes."""
