"""Files of questions in the formats that people have, as samples for comparisons, calibrations and evaluations."""
