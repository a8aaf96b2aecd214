"""What a data set holds, in numbers and on a page: statistics, equal images, warnings."""
