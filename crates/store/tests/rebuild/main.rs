//! What a rebuild rests on, seen from the store: which chunks it compares, and what it leaves of the old content.

mod change_marks;
mod crashes;
mod fail_stop;
mod failed_pass;
mod layers;
mod lost_page;
mod many_pages;
mod meets_apply;
mod replica;
