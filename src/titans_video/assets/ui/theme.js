// Applied before the page is drawn, so that it does not flash. Without a choice the system's setting counts.
"use strict";
const chosen = localStorage.getItem("theme");
if (chosen) document.documentElement.dataset.theme = chosen;
