"""What the figures look like: colours, told apart without colour vision (Okabe and Ito, 2008), and plain axes."""

from jaxprune.plot._style import BLUE as BLUE
from jaxprune.plot._style import GREEN as GREEN
from jaxprune.plot._style import GREY as GREY
from jaxprune.plot._style import INK as INK
from jaxprune.plot._style import LINES as LINES
from jaxprune.plot._style import ORANGE as ORANGE
from jaxprune.plot._style import PURPLE as PURPLE
from jaxprune.plot._style import RED as RED
from jaxprune.plot._style import SKY as SKY
from jaxprune.plot._style import YELLOW as YELLOW
from jaxprune.plot._style import apart as apart
from jaxprune.plot._style import frame as frame
from jaxprune.plot._style import sparsity_axis as sparsity_axis
